"""Makes the golden tensors of the parity tests from the official implementations."""
