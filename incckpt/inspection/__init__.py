"""Looking into a store without changing it: what it holds, what changed, who needs which bytes, whether it works."""
