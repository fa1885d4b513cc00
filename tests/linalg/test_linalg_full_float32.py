"""Catches: float32 products that are rounded to TF32 or bfloat16 inside a measurement, and settings that do not come
back: after an error, from within one another, from two threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from bnp_analysis.linalg import CallableOperator, condition_number, eigenpairs, spectral_density
from bnp_analysis.runtime.float32 import full_float32


def setting() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


@pytest.fixture(autouse=True)
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    assert setting() == "bf16"
    yield
    torch.set_float32_matmul_precision("highest")


def watching(seen: list[str]) -> CallableOperator:
    diagonal = torch.arange(1.0, 21.0)

    def product(v: torch.Tensor) -> torch.Tensor:
        seen.append(setting())
        return diagonal * v

    return CallableOperator(product, 20)


def test_products_and_verbs_run_in_full() -> None:
    seen: list[str] = []
    A = watching(seen)
    A @ torch.ones(20)
    condition_number(A, null=torch.zeros(20, 0))
    eigenpairs(A, k=1)
    spectral_density(A, probes=1, steps=4)
    assert set(seen) == {"ieee"}
    assert setting() == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"


def test_it_comes_back_after_an_error_and_from_inside() -> None:
    with pytest.raises(KeyboardInterrupt), full_float32, full_float32:
        raise KeyboardInterrupt
    assert setting() == "bf16"
    with full_float32:
        with full_float32:
            pass
        assert setting() == "ieee"
    assert setting() == "bf16"


def test_the_last_of_two_threads_restores() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with full_float32:
            inside.set()
            leave.wait(10)
            seen.append(setting())

    thread = threading.Thread(target=other)
    with full_float32:
        thread.start()
        inside.wait(10)
    assert setting() == "ieee"
    leave.set()
    thread.join()
    assert seen == ["ieee"]
    assert setting() == "bf16"


def test_an_inherited_setting_stays_inherited() -> None:
    torch.set_float32_matmul_precision("highest")
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with full_float32:
            assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
        assert torch.backends.mkldnn.conv.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
