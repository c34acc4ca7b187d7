"""What the benchmarks measure with: problems, peers, checks, clocks. Imported by the command and benchmarks/ only."""
