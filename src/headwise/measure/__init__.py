"""Measure: what training, bench and eval have in common -> descriptions of machine and model, texts, memory, turns."""
