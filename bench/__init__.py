"""The benchmark harness, installed as ``lstm_triton.bench``: cases, providers, timing, report."""
