"""The shipped Stable Diffusion 2 configs and tokenizer are those of the published model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sdcompress.models import sd2

# Parameters of the published models: in total, and in the weights of nn.Linear.
PUBLISHED = {
    "unet": (865_910_724, 301_219_840),
    "text_encoder": (340_387_840, 289_406_976),
    "vae": (83_653_863, None),
}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    sd2.write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("component", PUBLISHED)
def test_geometry(component: str) -> None:
    shapes = sd2.tensor_shapes(component, sd2.component_configs("sd2-base")[component])
    total, linear = PUBLISHED[component]
    assert sum(math.prod(shape) for shape in shapes.values()) == total
    if linear is not None:
        in_linear = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if len(shape) == 2 and not name.endswith("embedding.weight")
        )
        assert in_linear == linear


def test_all_configurations_share_one_geometry() -> None:
    base = sd2.tensor_shapes("unet", sd2.component_configs("sd2-base")["unet"])
    for name in sd2.CONFIGS:
        configs = sd2.component_configs(name)
        assert sd2.tensor_shapes("unet", configs["unet"]) == base
        assert configs["scheduler"]["beta_schedule"] == "scaled_linear"
    with pytest.raises(ValueError, match="no SD2 configuration"):
        sd2.component_configs("sdxl")


def test_what_tells_the_configurations_apart() -> None:
    facts = {
        name: (
            c["unet"]["sample_size"],
            c["scheduler"]["prediction_type"],
            c["scheduler"].get("timestep_spacing"),
            c["unet"].get("upcast_attention", False),
        )
        for name in sd2.CONFIGS
        for c in [sd2.component_configs(name)]
    }
    assert facts == {
        "sd2-base": (64, "epsilon", None, False),
        "sd2-768": (96, "v_prediction", None, True),
        "sd-turbo": (64, "epsilon", "trailing", False),
    }


def test_a_config_can_be_changed_without_changing_the_next() -> None:
    sd2.component_configs("sd2-base")["unet"]["block_out_channels"].append(1)
    assert sd2.component_configs("sd2-base")["unet"]["block_out_channels"] == [320, 640, 1280, 1280]


@pytest.mark.parametrize("name", sd2.CONFIGS)
def test_the_schedulers_load(tmp_path: Path, name: str) -> None:
    import diffusers

    sd2.write_configs(tmp_path, sd2.component_configs(name))
    configs = sd2.component_configs(name)
    scheduler_class = getattr(diffusers, configs["scheduler"]["_class_name"])
    scheduler = scheduler_class.from_pretrained(tmp_path / "scheduler")
    # SD's noise schedule: the last step keeps 0.0047 of the signal's variance.
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, rel=1e-3)
    scheduler.set_timesteps(1)
    assert int(scheduler.timesteps[0]) == (999 if name == "sd-turbo" else 1)


def test_the_tokenizer_gives_the_documented_ids(tokenizer_directory: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_directory)
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    ids = tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A PHOTO  of a Cat").input_ids == ids
    padded = tokenizer("", padding="max_length").input_ids
    assert padded == [49406, 49407] + [0] * 75


def test_the_tokenizer_covers_all_bytes(tokenizer_directory: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_directory)
    text = "日本 🎉 ñandú £5"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_the_vocabulary_carries_its_notice() -> None:
    notice = (Path(sd2.__file__).parent / "tokenizer/NOTICE.md").read_text()
    assert "MIT licence" in notice
    assert "THE SOFTWARE IS PROVIDED" in notice
