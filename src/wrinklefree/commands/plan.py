"""`wf plan`: what a training takes on given machines, before anything is paid for."""

import json

from wrinklefree.cloud import estimate, places, summary
from wrinklefree.config.compose import load_config


def run(overrides: list[str], *, cloud: str, gpus: int, nodes: int, spot: bool, as_json: bool = False) -> None:
    """Print the estimate of one stage. Raises UserError for a cloud or a size of it that there is not."""
    place = places.find_cloud(cloud)
    places.check_size(place, gpus, nodes, spot)
    config = load_config(overrides)
    model = estimate.skeleton(config)
    trains = model is not None and config.thinking is None
    stages = [estimate.estimate(config, model, place, gpus, nodes)] if trains and model is not None else []
    rented = summary.Rented(place, gpus, nodes, spot)
    if as_json:
        print(json.dumps(summary.figures(config, stages, model, rented)))
        return
    summary.show([config], stages, model, rented, None)
