"""What of Hugging Face PEFT a plan cannot use, and why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["LORA_REFUSED", "RESERVED", "UNUSABLE"]

LORA_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "corda_config": "CorDA needs covariances that PEFT collects in a pass of its own",
        "loftq_config": "LoftQ replaces the base by a quantised one",
        "lora_bias": "it trains a bias besides the weight; add the method `bias`",
        "alora_invocation_tokens": "it is for language models",
        "arrow_config": "it routes between adapters that exist already",
        "use_qalora": "it is for quantised bases",
        "use_bdlora": "it is for tensor-parallel language models",
        "monteclora_config": "it adds a loss of its own to a transformers output",
        "velora_config": "it changes what the backward pass keeps of a language model",
        "kasa_config": "it changes the base's weight for good",
        "layer_replication": "it changes the model",
    }
)
"""Fields of LoRA that a plan cannot honour, with the reason."""

RESERVED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "block_size_pattern",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "lambda_pattern",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "n_frequency_pattern",
        "peft_type",
        "peft_version",
        "rank_pattern",
        "revision",
        "runtime_config",
        "runtime_offload_base_weight",
        "target_modules",
        "target_parameters",
        "target_svd_config",
        "task_type",
        "total_step",
        "trainable_token_indices",
    }
)
"""Fields of configurations that say where and how large: the plan decides that."""

_LANGUAGE = "it needs the embeddings or the attention of a language model of transformers"
UNUSABLE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "adaption_prompt",
                "cartridge",
                "cpt",
                "multitask_prompt_tuning",
                "p_tuning",
                "prefix_tuning",
                "prompt_tuning",
                "shadow",
                "xlora",
            ),
            _LANGUAGE,
        ),
        "poly": "it needs the number of the task with every batch",
        "trainable_tokens": "it trains rows of an embedding, and an image model has none",
        "corda": LORA_REFUSED["corda_config"],
        "loftq": LORA_REFUSED["loftq_config"],
    }
)
"""Types that image models cannot use, with the reason."""
