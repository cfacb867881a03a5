"""Where the time of one extraction goes, layer by layer: read, decompose, store. By hand, on a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lycotool.linalg import dense


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    shapes = [(1280, 1280), (10240, 1280), (1280, 5120), (640, 640), (1280, 11520), (640, 5760), (320, 2880)]
    for shape in shapes:
        matrix = torch.randn(shape, device=device)
        matrix += torch.randn(shape[0], 24, device=device) @ torch.randn(24, shape[1], device=device) * 0.4
        dense.leading(matrix, 64, seed=0)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            dense.leading(matrix, 64, seed=0)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        print(shape, "leading", round(sorted(times)[2] * 1e3, 2), "ms")
    for n in (72, 144, 216, 288, 432, 1280):
        for where in ("cpu", device):
            gram = torch.randn(n, n, dtype=torch.float64, device=where)
            gram = gram @ gram.T
            torch.linalg.eigh(gram)
            start = time.perf_counter()
            for _ in range(3):
                torch.linalg.eigh(gram)
            if where == "cuda":
                torch.cuda.synchronize()
            print("eigh", n, where, round((time.perf_counter() - start) / 3 * 1e3, 2), "ms")
    for w in (72, 144):
        y = torch.randn(1280, w, device=device)
        torch.linalg.qr(y)
        start = time.perf_counter()
        for _ in range(5):
            torch.linalg.qr(y)
        if device == "cuda":
            torch.cuda.synchronize()
        print("qr 1280x", w, round((time.perf_counter() - start) / 5 * 1e3, 2), "ms")


if __name__ == "__main__":
    main()
