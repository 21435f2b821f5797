"""What the benchmarks share: options and records, parties that take turns, fairseq's form of a corpus."""
