"""The CUDA runtime through ctypes, against a stand-in that checks what C would check."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from export.device.cuda import Cuda
from export.device.errors import DeviceError
from tests.fake_cuda import FakeLibrary, fake_cuda


def test_facts_of_the_gpu() -> None:
    cuda, _ = fake_cuda(compute_capability="12.0", memory=1000)
    assert cuda.compute_capability == "12.0"
    assert cuda.name == "Fake GPU"
    assert cuda.pci_bus_id == "0000:01:00.0"
    assert cuda.driver_version == cuda.runtime_version == "12.6"
    assert cuda.mem_get_info() == (1000, 1000)


def test_a_gpu_on_no_bus_has_no_name_there() -> None:
    cuda, _ = fake_cuda(failing={"cudaDeviceGetPCIBusId": 801})
    assert cuda.pci_bus_id is None


def test_bytes_go_to_the_gpu_and_come_back() -> None:
    cuda, library = fake_cuda()
    stream = cuda.stream()
    pointer = cuda.malloc(6)
    cuda.upload(pointer, memoryview(b"abcdef"), stream)
    assert cuda.download(pointer, 6, stream) == bytearray(b"abcdef")
    assert library.peak == 6
    cuda.free(pointer)
    cuda.destroy_stream(stream)
    assert library.allocated == {}
    assert library.alive == set()


def test_pointers_keep_their_64_bits() -> None:
    cuda, library = fake_cuda()
    pointer = cuda.malloc(1)
    assert list(library.allocated) == [pointer]
    assert pointer > 1 << 32


def test_events_tell_the_time_between_them() -> None:
    cuda, library = fake_cuda()
    stream, start, end = cuda.stream(), cuda.event(), cuda.event()
    cuda.record(start, stream)
    library.enqueue(lambda: None, milliseconds=2.5)
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) == 2.5


def test_a_captured_graph_runs_when_it_is_launched() -> None:
    cuda, library = fake_cuda()
    stream, ran = cuda.stream(), []
    with cuda.capture(stream) as made:
        library.enqueue(lambda: ran.append(1))
    assert ran == []
    cuda.launch(made[0], stream)
    cuda.launch(made[0], stream)
    assert ran == [1, 1]
    cuda.destroy_graph(made[0])
    assert library.alive == {stream}


def test_a_capture_that_fails_is_ended_and_its_reason_survives() -> None:
    cuda, _ = fake_cuda()
    stream = cuda.stream()
    with pytest.raises(DeviceError, match="^the reason$"), cuda.capture(stream):
        raise DeviceError("the reason")
    cuda.synchronize(stream)  # which a stream that still captures refuses


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        (
            "cudaMalloc",
            2,
            "out of memory (cudaMalloc, code 2); close other programs, or use --residency "
            "sequential or smaller pictures",
        ),
        ("cudaMalloc", 700, "unrecognized error code (cudaMalloc, code 700)"),
    ],
)
def test_errors_are_cudas_words_and_what_to_do(function: str, code: int, message: str) -> None:
    cuda, _ = fake_cuda(failing={function: code})
    with pytest.raises(DeviceError) as error:
        cuda.malloc(1)
    assert str(error.value) == message
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"devices": 0}, "no CUDA-capable device is detected (cudaGetDeviceCount, code 100); no "),
        ({"failing": {"cudaGetDeviceCount": 35}}, "there is no NVIDIA driver here, or one older"),
    ],
)
def test_no_gpu_and_an_old_driver(how: dict[str, Any], words: str) -> None:
    with pytest.raises(DeviceError) as error:
        Cuda(FakeLibrary(**how))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_out_of_memory() -> None:
    cuda, library = fake_cuda(memory=100)
    cuda.malloc(60)
    with pytest.raises(DeviceError, match="out of memory"):
        cuda.malloc(60)
    assert library.used == 60


def test_a_function_the_runtime_lacks() -> None:
    class Old(FakeLibrary):
        @property
        def cudaGraphInstantiateWithFlags(self) -> Any:  # type: ignore[override]  # noqa: N802
            raise AttributeError

    cuda = Cuda(Old())
    with (
        pytest.raises(DeviceError, match="has no cudaGraphInstantiateWithFlags; install CUDA 12"),
        cuda.capture(cuda.stream()),
    ):
        pass


def test_the_library_is_looked_for_in_pip_wheels_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    asked = []

    def load(name: str) -> Any:
        asked.append(name)
        if not name.startswith(str(tmp_path)):
            raise OSError
        return FakeLibrary()

    folder = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.12").touch()
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.syspath_prepend(tmp_path)
    assert Cuda.load().name == "Fake GPU"
    assert asked[:4] == ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    assert asked[-1] == str(folder / "libcudart.so.12")


def test_no_runtime_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(DeviceError, match="libcudart.*JetPack.*pip install nvidia-cuda-runtime"):
        Cuda.load()
