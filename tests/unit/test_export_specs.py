"""The table of inputs and outputs."""

from __future__ import annotations

import numpy as np
import pytest

from export.specs import COMPONENTS, canonical_key, component_spec, make_inputs, unused_key

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1024,
    "down_block_types": ["a", "b", "c", "d"],
}
TEXT = {"max_position_embeddings": 77, "hidden_size": 1024, "vocab_size": 49408}
VAE = {"latent_channels": 4, "out_channels": 3}
CONFIGS = {"text_encoder": TEXT, "unet": UNET, "vae_decoder": VAE}


def test_unet_speaks_optimums_names_and_types() -> None:
    spec = component_spec("unet", UNET)
    assert [(t.name, t.numpy_dtype("fp16"), t.axes) for t in spec.inputs] == [
        ("sample", "float16", ("batch", 4, "height", "width")),
        ("timestep", "int64", ()),
        ("encoder_hidden_states", "float16", ("batch", "tokens", 1024)),
    ]
    assert [t.name for t in spec.outputs] == ["out_sample"]
    assert spec.multiple == 8


def test_text_encoder_takes_int32_and_gives_both_outputs() -> None:
    spec = component_spec("text_encoder", TEXT)
    assert [(t.name, t.dtype, t.axes) for t in spec.inputs] == [
        ("input_ids", "int32", ("batch", 77))
    ]
    assert [t.name for t in spec.outputs] == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_inputs_fit_the_table_and_are_seeded(component: str) -> None:
    config = CONFIGS[component]
    spec = component_spec(component, config)
    sizes = {"batch": 3, "height": 16, "width": 24, "tokens": 77}
    made = make_inputs(spec, config, "fp16", batch=3, height=16, width=24, seed=1)
    again = make_inputs(spec, config, "fp16", batch=3, height=16, width=24, seed=1)
    assert list(made) == [t.name for t in spec.inputs]
    for tensor in spec.inputs:
        assert made[tensor.name].shape == tensor.shape(sizes)
        assert made[tensor.name].dtype == tensor.numpy_dtype("fp16")
        np.testing.assert_array_equal(made[tensor.name], again[tensor.name])


def test_texts_end_with_the_last_token() -> None:
    ids = make_inputs(component_spec("text_encoder", TEXT), TEXT, "fp32")["input_ids"]
    assert (ids[:, -1] == 49407).all()
    assert (ids[:, :-1] < 49407).all()


def test_old_vae_names_are_read_as_todays() -> None:
    old = "decoder.mid_block.attentions.0.proj_attn.weight"
    assert canonical_key("vae_decoder", old) == "decoder.mid_block.attentions.0.to_out.0.weight"
    assert canonical_key("unet", "conv_in.weight") == "conv_in.weight"


def test_both_names_of_a_text_encoders_tensor_are_one() -> None:
    key = "text_model.final_layer_norm.bias"
    assert canonical_key("text_encoder", key) == key
    assert canonical_key("text_encoder", "final_layer_norm.bias") == key


def test_only_known_tensors_are_unused() -> None:
    assert unused_key("vae_decoder", "encoder.conv_in.weight")
    assert unused_key("text_encoder", "text_model.embeddings.position_ids")
    assert not unused_key("vae_decoder", "decoder.conv_in.weight")
    assert not unused_key("unet", "encoder.conv_in.weight")
