"""The families' `config.json` for transformers and vLLM, in place of the published remote code."""

from typing import Any

import transformers

from failfast_vllm.drafters.families import FAMILIES, Family


def _config_class(family: Family) -> type[Any]:
    """The base's fields, with the family's block size and MASK where a file states them."""
    base, name = family.base_model.split(".")[1], family.architecture
    bases = (getattr(transformers, base.replace("ForCausalLM", "Config")),)
    fields = {
        "__module__": __name__,
        "__doc__": f"The config of {family.name}.",
        "model_type": family.model_types[0],
        "attribute_map": {},  # every field keeps its published name
    }
    return type(name.replace("ForCausalLM", "Config"), bases, fields)


CONFIGS = {family.model_types[0]: _config_class(family) for family in FAMILIES}
globals().update((cls.__name__, cls) for cls in CONFIGS.values())  # ranks unpickle them by name
