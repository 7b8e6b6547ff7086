"""Laws and oracles: what plug-in authors test with."""
