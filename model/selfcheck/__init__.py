"""Checks that `python -m gpu_etl doctor` starts: whether the training step computes here what it should.

python -m model.selfcheck steps cuda
"""
