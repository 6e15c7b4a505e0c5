"""What tests share: inputs, the oracle, tolerances, thresholds, child processes."""
