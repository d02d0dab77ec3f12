"""The first part of the model card: what the model is.

`export/formats/packed.py` adds how to load it, its sizes and the certificate.
"""

from wrinklefree.config.schema import Config

FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [wrinklefree, quantization-aware-training, {method}]
---

# {name}

`{base}` quantized with `{method}`, trained by `wf train` (stage `{stage}`, seed {seed}).

| setting of the method | value |
|---|---|
{settings}
"""


def card(config: Config) -> str:
    """Return the beginning of README.md for a run that quantizes."""
    settings = vars(config.method).items()
    return FRONT.format(
        base=config.model.pretrained,
        method=config.method.name,
        name=f"{config.model.name}, {config.training.stage}",
        stage=config.training.stage,
        seed=config.seed,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings if key != "name"),
    )
