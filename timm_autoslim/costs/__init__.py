"""What a subnet costs: MACs, parameters, memory and latency."""
