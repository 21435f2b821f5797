"""What things cost: FLOPs (counted), latency and machine speed (measured)."""
