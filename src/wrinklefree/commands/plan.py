"""`wf plan`: what a training takes on given machines, before anything is paid for."""

import json

from wrinklefree.cloud import estimate, places, summary
from wrinklefree.cloud.start import estimates, show_estimate
from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError


def run(overrides: list[str], *, cloud: str, gpus: int, nodes: int, spot: bool, as_json: bool = False) -> None:
    """Print the estimate of one stage. Raises UserError for a cloud or a size of it that there is not."""
    place = places.find_cloud(cloud)
    places.check_size(place, gpus, nodes, spot)
    config = load_config(overrides)
    model = estimate.skeleton(config)
    if config.thinking is not None and gpus * nodes > 1:
        raise UserError("a stage of LLM-TRM trains in one process: leave out --gpus and --nodes")
    rented = summary.Rented(place, gpus, nodes, spot)
    if not as_json:
        show_estimate(config, rented)
        return
    model = estimate.skeleton(config)
    stages = [] if model is None else estimates([config], model, place, gpus, nodes)
    print(json.dumps(summary.figures(config, stages, model, rented)))
