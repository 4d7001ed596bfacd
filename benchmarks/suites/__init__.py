"""The engine behind `benchmarks/run.py`: what is measured (cases), how (memory, timing), what is written."""
