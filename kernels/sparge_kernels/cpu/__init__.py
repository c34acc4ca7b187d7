"""CPU implementations of `sparge::attention`."""
