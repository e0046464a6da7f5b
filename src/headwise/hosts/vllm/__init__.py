"""vLLM: requests that say how much of their prompt stays -> blocks that are freed while they run."""
