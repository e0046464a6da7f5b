"""Store, 4/7: kept rows of every (sequence, KV head) -> pages that hold them and nothing else."""
