"""Ranks: process group, exchange, sharded tables, failure detector."""
