"""Reading verbose logs and inspector documents.

The TensorRT 8 and 10 samples are synthetic: written by hand in the wording of public logs. The
TensorRT-RTX sample is cut from a log that TensorRT-RTX 1.7 wrote.
"""

from __future__ import annotations

import json

import pytest

from export.device.evidence import (
    LogFacts,
    fused_attention,
    inspector_tactics,
    read_log,
    sparse_tactics,
    weigh,
)

SYNTHETIC_8 = """\
[I] [TRT] (Sparsity) Layers eligible for sparse math: Conv_0 + Relu_1, MatMul_7, Conv_9
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_9
[I] [TRT] Total Activation Memory: 7864832
"""
SYNTHETIC_8_NONE = """\
[I] [TRT] (Sparsity) Layers eligible for sparse math: Conv_0 + Relu_1
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:
"""
SYNTHETIC_10 = """\
[VERBOSE] (Sparsity) Found 4 layer(s) eligible to use sparse tactics: a, b, c, d
[VERBOSE] (Sparsity) Chose 3 layer(s) using sparse tactics: a, b, c
[VERBOSE] (Sparsity) Found 112 layer(s) eligible to use sparse tactics: a, b, c, d
[VERBOSE] (Sparsity) Chose 1 layer(s) using sparse tactics: a
[INFO] Total Device Persistent Memory: 512
[INFO] Total Activation Memory: 1000 bytes
[INFO] Total Activation Memory: 4000 bytes
"""
FROM_TENSORRT_RTX = """\
[WARNING] ModelImporter.cpp:1071: Make sure input timestep has Int64 binding.
[WARNING] ModelImporter.cpp:1071: Make sure input timestep has Int64 binding.
[INFO] Total Device Persistent Memory: 0 bytes
[INFO] Total Activation Memory: 96974336 bytes
[VERBOSE] Layers:
Name: node_conv2d_24_myl0_228, LayerType: correlation, Inputs: [], TacticName: \
__myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_conv2d_24]
Name: _gemm_mha_v2_myl0_19, LayerType: kgen, Inputs: [], TacticName: \
_gemm_mha_v2_0xfd53061f128b082e, StreamId: 0, Metadata: [ONNX Layer: node_MatMul_178]
Name: __myl_FcAdd_myl0_222, LayerType: runtime_fusion, Inputs: [], TacticName: , StreamId: 0
"""


def facts(text: str, workspace_mb: int | None = None) -> LogFacts:
    return read_log(text.splitlines(), workspace_mb)


def test_the_log_of_tensorrt_8() -> None:
    found = facts(SYNTHETIC_8)
    assert (found.generation, found.eligible, found.chosen) == ("8.x", 3, 1)
    assert found.context_bytes == 7864832
    none = facts(SYNTHETIC_8_NONE)
    assert (none.generation, none.eligible, none.chosen) == ("8.x", 1, 0)


def test_in_the_log_of_tensorrt_10_the_last_statement_counts() -> None:
    found = facts(SYNTHETIC_10)
    assert (found.generation, found.eligible, found.chosen) == ("10.x", 112, 1)


def test_a_context_holds_the_largest_profile_and_what_persists() -> None:
    assert facts(SYNTHETIC_10).context_bytes == 4512


def test_the_log_of_tensorrt_rtx() -> None:
    found = facts(FROM_TENSORRT_RTX)
    assert (found.generation, found.eligible, found.chosen) == (None, None, None)
    assert found.context_bytes == 96974336
    assert found.tactics == ["__myelin_CASK_STUB", "_gemm_mha_v2_0xfd53061f128b082e", ""]
    assert found.warnings == ["ModelImporter.cpp:1071: Make sure input timestep has Int64 binding."]


def test_only_the_last_list_of_layers_counts() -> None:
    found = facts(
        FROM_TENSORRT_RTX + "[VERBOSE] Layers:\nName: a, LayerType: kgen, TacticName: x\n"
    )
    assert found.tactics == ["x"]


def test_a_log_that_says_nothing() -> None:
    found = facts("[INFO] hello\n")
    assert found == LogFacts()
    assert weigh(found, None, None).layers_sparse is None


@pytest.mark.parametrize(
    "line",
    [
        "[WARNING] UNSUPPORTED_STATE: Skipping tactic 7 due to insufficient memory on requested "
        "size of 629145600 detected for tactic 0x0000000000000007.",
        "[W] [TRT] Skipping tactic 3 due to insuficient memory on requested size of 449 detected "
        "for tactic 4.",
        "[WARNING] Tactic Device request: 600MB Available: 302MB. Device memory is insufficient "
        "to use tactic.",
        "[ERROR] [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "[ERROR] [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory",
        "[WARNING] Requested amount of GPU memory (17179869184 bytes) could not be allocated.",
        "[VERBOSE] Skipping tactic 0x2 due to oom error on requested size of 4719",
        "NvMapMemAllocInternalTagged: 1075072515 error 12",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_memory_the_device_did_not_have(line: str) -> None:
    """Synthetic lines; all of them ask for less than the workspace limit."""
    assert facts(line, workspace_mb=1024).out_of_memory == [line]


@pytest.mark.parametrize(
    "line",
    [
        "[WARNING] Skipping tactic 7 due to insufficient memory on requested size of 1629145600 "
        "detected for tactic 0x0000000000000007.",
        "[W] [TRT] Skipping tactic 3 due to insuficient memory on requested size of 1449 detected",
        "[WARNING] Tactic Device request: 1600MB Available: 1024MB. Device memory is insufficient",
        "[INFO] Some tactics do not have sufficient workspace memory to run.",
        "[ERROR] no tactics to implement the operation within workspace limit.",
    ],
)
def test_the_workspace_limit_is_no_lack_of_memory(line: str) -> None:
    """Synthetic lines; tactics that need more than we allow are meant to be left out."""
    found = facts(line, workspace_mb=1024)
    assert found.out_of_memory == []
    assert found.over_workspace == 1


def test_without_a_limit_all_that_does_not_fit_is_lack_of_memory() -> None:
    line = "[WARNING] Tactic Device request: 16000MB Available: 7400MB. Device memory is too small"
    assert facts(line).out_of_memory == [line]


def test_names_of_sparse_tactics() -> None:
    names = [
        "sm80_xmma_fprop_sparse_conv_f16f16",
        "ampere_spmma_128x128",
        "cutlass_SP_GEMM_f16",
        "sm80_xmma_gemm_f16f16",
        "",
    ]
    assert sparse_tactics(names) == names[:3]


def test_names_of_fused_attention() -> None:
    names = ["_gemm_mha_v2_0xfd", "fmha_v2_flash_attention_fp16_64", "softmax", "__myl_MulSum"]
    assert fused_attention(names) == 2


def test_the_inspector_tells_tactics_only_with_detailed_verbosity() -> None:
    layers = [{"Name": "a", "HasSparseWeights": 1, "TacticName": "dense_gemm"}, {"Name": "b"}]
    assert inspector_tactics(json.dumps({"Layers": layers})) == ["dense_gemm", ""]
    assert inspector_tactics(json.dumps({"Layers": ["a", "b"]})) is None
    assert inspector_tactics(json.dumps({"Layers": []})) is None


def test_tactic_names_are_the_proof() -> None:
    log = facts(SYNTHETIC_10)
    proof = weigh(log, ["sm80_sparse_a", "sm80_sparse_a", "dense"], 77)
    assert (proof.layers_eligible, proof.layers_sparse) == (112, 2)
    assert proof.sparse_tactics == ["sm80_sparse_a"]
    assert (proof.context_bytes, proof.context_from) == (77, "engine")


def test_sparse_weights_without_sparse_tactics_are_none() -> None:
    assert weigh(facts(SYNTHETIC_10), ["dense", "dense"], None).layers_sparse == 0


def test_nameless_tactics_leave_the_word_to_the_log() -> None:
    evidence = weigh(facts(SYNTHETIC_10), ["dense", ""], None)
    assert evidence.layers_sparse == 1
    assert (evidence.context_bytes, evidence.context_from) == (4512, "log")


def test_stubs_of_tensorrt_rtx_prove_nothing() -> None:
    evidence = weigh(facts(FROM_TENSORRT_RTX), None, None)
    assert (evidence.layers_sparse, evidence.tactics, evidence.fused_attention) == (None, 3, 1)
    # Nor where the engine's inspector, on a card, shows nothing but names.
    assert weigh(LogFacts(), ["__myelin_CASK_STUB", "_gemm_mha_v2"], 1).layers_sparse is None
    assert weigh(LogFacts(), ["sm86_gemm", "_gemm_mha_v2"], 1).layers_sparse == 0


def test_tactics_over_the_limit_are_a_warning() -> None:
    log = facts("[INFO] Some tactics do not have sufficient workspace memory to run.", 64)
    assert weigh(log, None, None).warnings == [
        "1 lines tell of tactics left out because of the workspace limit"
    ]
