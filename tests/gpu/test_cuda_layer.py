"""The CUDA interface on a real GPU: memory, streams, events, graphs, and what goes wrong, by either library."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from app.domain.failures import StageFailure
from workers.devices.cuda import runtime as cuda_runtime


def test_bytes_come_back_as_they_went(cuda: cuda_runtime.Cuda) -> None:
    stream = cuda.stream()
    up = cuda.pinned((1000, 33), np.float32)
    up[...] = np.random.default_rng(0).normal(size=up.shape)
    down = cuda.pinned(up.shape, up.dtype)
    down[...] = 0
    buffer = cuda.alloc(up.nbytes)
    assert buffer.ptr
    assert buffer.nbytes == up.nbytes
    buffer.copy_from_host(up, stream)
    buffer.copy_to_host(down, stream)
    stream.synchronize()
    assert np.array_equal(up, down)
    buffer.free()
    buffer.free()
    stream.close()


def test_ordinary_arrays_can_be_copied_too(cuda: cuda_runtime.Cuda) -> None:
    stream = cuda.stream()
    up = np.arange(7, dtype=np.int64)
    down = np.zeros_like(up)
    buffer = cuda.alloc(up.nbytes)
    buffer.copy_from_host(up, stream)
    buffer.copy_to_host(down, stream)
    stream.synchronize()
    assert down.tolist() == up.tolist()


def test_a_pinned_array_lives_as_long_as_a_view_of_it(cuda: cuda_runtime.Cuda) -> None:
    view = cuda.pinned((4, 4), np.float16)[1:3]
    view[...] = 2
    gc.collect()
    assert float(view.sum()) == 16.0
    assert cuda.pinned((0, 3), np.float32).shape == (0, 3)


def test_what_does_not_fit_is_refused(cuda: cuda_runtime.Cuda) -> None:
    stream = cuda.stream()
    buffer = cuda.alloc(16)
    with pytest.raises(ValueError, match="do not fit"):
        buffer.copy_from_host(np.zeros(5, np.float32), stream)
    with pytest.raises(ValueError, match="contiguous"):
        buffer.copy_from_host(np.zeros((2, 3), np.float32).T, stream)
    buffer.free()
    with pytest.raises(ValueError, match="freed"):
        buffer.copy_from_host(np.zeros(1, np.float32), stream)


def test_events_tell_the_time_of_a_copy(cuda: cuda_runtime.Cuda) -> None:
    stream, start, end = cuda.stream(), cuda.event(), cuda.event()
    host = cuda.pinned((64 << 20,), np.uint8)
    buffer = cuda.alloc(host.nbytes)
    start.record(stream)
    buffer.copy_from_host(host, stream)
    end.record(stream)
    elapsed = end.elapsed_ms(start)
    assert 0.5 < elapsed < 500  # 64 MiB at between 0.1 and 130 GB/s


def test_a_captured_copy_runs_at_every_launch(cuda: cuda_runtime.Cuda) -> None:
    stream = cuda.stream()
    up, down = cuda.pinned((256,), np.int32), cuda.pinned((256,), np.int32)
    buffer = cuda.alloc(up.nbytes)
    up[...] = 1
    down[...] = 0
    with cuda.capture(stream) as graph:
        buffer.copy_from_host(up, stream)
        buffer.copy_to_host(down, stream)
    stream.synchronize()
    assert down.sum() == 0  # recorded, not run
    for value in (3, 4):
        up[...] = value
        graph.launch(stream)
        stream.synchronize()
        assert down.tolist() == [value] * 256
    graph.close()
    with pytest.raises(StageFailure, match="no graph"):
        graph.launch(stream)


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: cuda_runtime.Cuda) -> None:
    stream = cuda.stream()
    buffer = cuda.alloc(64)
    with pytest.raises(RuntimeError, match="on purpose"), cuda.capture(stream):
        raise RuntimeError("on purpose")
    host = np.full(16, 5, np.float32)
    buffer.copy_from_host(host, stream)
    stream.synchronize()
    with pytest.raises(StageFailure) as caught, cuda.capture(stream):
        stream.synchronize()  # not allowed while capturing
    assert caught.value.code == "cuda_error"
    back = np.zeros(16, np.float32)
    buffer.copy_to_host(back, stream)
    stream.synchronize()
    assert back.sum() == 80


def test_memory_is_told_and_its_lack_is_typed(cuda: cuda_runtime.Cuda) -> None:
    free, total = cuda.mem_info()
    assert 0 < free <= total
    with pytest.raises(StageFailure) as caught:
        cuda.alloc(total * 2)
    assert caught.value.code == "gpu_out_of_memory"
    buffer = cuda.alloc(1 << 30)
    assert cuda.mem_info()[0] <= free - (1 << 29)
    buffer.free()
    del buffer
    assert cuda.mem_info()[0] >= free - (1 << 28)


def test_a_second_thread_has_the_context_of_its_own_block(cuda: cuda_runtime.Cuda) -> None:
    seen: list[int] = []

    def work() -> None:
        with cuda.context():
            buffer = cuda.alloc(128)
            seen.append(buffer.ptr)
            buffer.free()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen
    assert seen[0]


def test_the_context_is_the_one_that_other_libraries_use(cuda: cuda_runtime.Cuda) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    tensor = torch.arange(1000, device="cuda", dtype=torch.float32)
    torch.cuda.synchronize()
    stream = cuda.stream()
    buffer = cuda.alloc(4000)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
        doubled = tensor * 2
    stream.synchronize()
    assert float(doubled.sum()) == 999000.0
    buffer.free()


def test_a_device_that_is_not_there(gpu: dict[str, object]) -> None:
    with pytest.raises(StageFailure) as caught:
        cuda_runtime.Cuda(device=99)
    assert caught.value.code == "cuda_unavailable"
