from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.config.decode import load_study, study_from_dict, study_from_yaml, study_to_dict, study_to_yaml
from autopeft.config.study import Study
from autopeft.errors import UnknownKey, UnknownPlugin, UsageError
from autopeft.methods.lora import LoRA
from autopeft.methods.sparse import Sparse
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.search.nsga2 import NSGA2
from autopeft.search.random import Random


def test_an_empty_file_is_the_default_study(default: Study) -> None:
    assert study_from_yaml("") == default
    assert study_from_yaml("# nothing\n") == default
    assert study_from_dict({}) == default


def test_a_task_brings_its_own_defaults(default: Study, tmp_path: Path) -> None:
    study = load_study([], {"task": "diffusion"})
    assert study.model.spec == "bundled:unet_tiny_fashion"
    assert study.data.spec.startswith("digits?planted=")
    assert (study.reward.goals, study.reward.names) == (("minimize",), ("denoising_loss",))
    assert not study.head_warmup
    assert study_from_yaml("task: {type: diffusion, snr_gamma: 5}").reward == study.reward
    assert study_from_dict(study_to_dict(study)) == study
    file = tmp_path / "study.yaml"
    file.write_text("{task: diffusion, data: {spec: pictures, batch_size: 8}, head_warmup: true}")
    own = load_study([file], {"model.spec": "diffusers:here#unet"})
    assert (own.data.spec, own.data.batch_size, own.head_warmup) == ("pictures", 8, True)
    assert own.model.spec == "diffusers:here#unet"
    assert load_study([], {"task": "classification"}) == default


def test_a_study_as_a_person_writes_it(default: Study) -> None:
    study = study_from_yaml(
        """
        model: {spec: vit_base_patch16_224, img_size: 224, kwargs: {drop_path_rate: 1e-1, global_pool: no}}
        data: {spec: /data/flowers, batch_size: 32, val_frac: 0.2}
        budget: 86000
        methods: {lora: {alpha: 8}, sparse_bias: null, wide: {type: lora, alpha: 16}}
        scorer: {type: fisher, power: 1, gradient: {batch_size: 4}}
        allocator: knapsack
        gain: {exponent: 0.7, methods: {lora: 2}, roles: {qkv: 0.5}, depth_tilt: -1}
        train: {epochs: 20, lr: {core: 1e-2}, betas: [0.9, 0.95], amp: off}
        search: {trials: 30, time_limit: 600, space: lora_only, seeds: 5}
        fused: slices
        device: cpu
        seed: 7
        """
    )
    assert study.model.kwargs == {"drop_path_rate": 0.1, "global_pool": "no"}
    assert study.budget == "86000"
    assert study.methods == {"lora": LoRA(8.0), "sparse_bias": Sparse(slot="bias"), "wide": LoRA(16.0)}
    assert study.scorer == Fisher(Gradient(batch_size=4), power=1.0)
    assert study.train.lr.core == 0.01
    assert study.train.lr.head == default.train.lr.head
    assert (study.train.betas, study.train.amp) == ((0.9, 0.95), "off")
    assert (study.search.time_limit, study.gain.depth_tilt) == (600.0, -1.0)
    assert study_from_yaml(study_to_yaml(study)) == study


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("epochs: 3", UnknownKey, r"^study has no key 'epochs'\. Known: model, data, task, budget"),
        ("budgte: 1%", UnknownKey, r"^study has no key 'budgte'\. Did you mean 'budget'\?"),
        (
            "scorer: {type: fisher, n_batchs: 8}",
            UnknownKey,
            r"^study\.scorer has no key 'n_batchs'\. Known: gradient, power, damping\.$",
        ),
        ("scorer: fischer", UnknownPlugin, r"^study\.scorer: no scorer is called 'fischer'\. Did you mean 'fisher'\?"),
        (
            "methods: [lroa]",
            UnknownPlugin,
            r"^study\.methods\.lroa: no method is called 'lroa'\. Did you mean 'lora'\?",
        ),
        ("methods: {lora: {alpha: no}}", UsageError, r"^study\.methods\.lora\.alpha: expected a number, got 'no'$"),
        ("train: {epochs: true}", UsageError, r"^study\.train\.epochs: expected a whole number, got True$"),
        ("train: {epochs: 0}", UsageError, r"train\.epochs must be a whole number of at least 1, got 0$"),
        (
            "train: {lr: 1e-3}",
            UsageError,
            r"^study\.train\.lr: expected a mapping with keys among head, .*, got 0\.001$",
        ),
        ("train: {lr: {core: -1}}", UsageError, r"lr\.core must be a finite number, more than 0, got -1\.0$|lr\.core"),
        ("model: {pretrained: no}", UsageError, r"^study\.model\.pretrained: expected true or false, got 'no'$"),
        ("model: {img_size: 0}", UsageError, r"^study\.model: the image size must be at least 1 pixel, got 0$"),
        ("budget: 0", UsageError, r"^a budget of '0' buys nothing"),
        ("budget: true", UsageError, r"^study\.budget: expected text, got True$"),
        ("gain: {roles: {qvk: 2}}", UsageError, r"gain\.roles has no group 'qvk'"),
        ("version: 2", UsageError, r"^the study is written in version 2 of the format"),
        ("a: 1\na: 2", UsageError, r"^study, line 2, column 1: the key 'a' stands twice$"),
        ("[1]", UsageError, r"^study: a study is a mapping of keys to values, found \[1\]$"),
    ],
)
def test_an_error_is_one_sentence_with_its_place(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        study_from_yaml(text)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_the_default_study_survives_yaml_and_json(default: Study) -> None:
    assert study_from_yaml(study_to_yaml(default)) == default
    assert study_from_dict(json.loads(json.dumps(study_to_dict(default), allow_nan=False))) == default
    assert list(study_to_dict(default)) == list(Study.names())


positive = st.floats(1e-8, 1e3)
changes = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63),
        "budget": st.sampled_from(["1%", "86k", "500KB", "like:lora-r8", "1198"]),
        "fused": st.sampled_from(["whole", "slices", "both"]),
        "head_warmup": st.booleans(),
        "device": st.text(min_size=1).filter(str.strip),
        "methods": st.dictionaries(
            st.text(min_size=1, max_size=4), st.builds(LoRA, st.none() | positive), min_size=1, max_size=3
        ),
        "scorer": st.builds(Fisher, power=st.floats(0, 1), damping=positive),
    },
)


@settings(max_examples=30)
@given(changes)
def test_any_study_survives_yaml(default: Study, changes: dict[str, Any]) -> None:
    study = dataclasses.replace(default, **changes)
    back = study_from_yaml(study_to_yaml(study))
    assert back == study
    assert repr(back) == repr(study)


def test_files_are_merged_left_to_right_and_single_settings_come_last(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\ntrain: {epochs: 3}\nmethods: [lora, core]\n")
    second.write_text("seed: 2\nmethods: {lora: {alpha: 8}}\n")
    study = load_study([first, second], {"train.epochs": 5, "methods.lora.alpha": 9})
    assert (study.seed, study.train.epochs, list(study.methods)) == (2, 5, ["lora", "core"])
    assert study.methods["lora"] == LoRA(9.0)
    chosen = load_study([first, second], {"methods": ["lora"], "train.lr.core": 0.5})
    assert list(chosen.methods) == ["lora"]
    assert chosen.train.epochs == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no study file at .*none\.yaml"):
        load_study([tmp_path / "none.yaml"], {})
    with pytest.raises(UsageError, match=r"cannot read the study file .*: Is a directory"):
        load_study([tmp_path], {})
    (tmp_path / "a.yaml").write_bytes(b"\xff\xff")
    with pytest.raises(UsageError, match=r"cannot read the study file .*a\.yaml: it is not text in UTF-8"):
        load_study([tmp_path / "a.yaml"], {})
    (tmp_path / "b.yaml").write_text("seed: [1\n")
    with pytest.raises(UsageError, match=r"b\.yaml, line \d"):
        load_study([tmp_path / "b.yaml"], {})


def test_a_sampler_is_a_plugin_inside_of_the_search() -> None:
    study = load_study([], {"search.sampler": "nsga2", "search.sampler.population": 8})
    assert study.search.sampler == NSGA2(population=8)
    data = study_to_dict(study)
    assert data["search"]["sampler"] == {"type": "nsga2", "population": 8}
    assert study_from_dict(json.loads(json.dumps(data))) == study
    assert study_from_yaml("search: {sampler: random}").search.sampler == Random()
    with pytest.raises(UnknownPlugin, match=r"no sampler is called 'ngsa2'\. Did you mean 'nsga2'\?"):
        study_from_yaml("search: {sampler: ngsa2}")
