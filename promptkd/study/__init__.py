"""Compare methods in a declared grid: rates chosen on dev data, several training seeds, tests of the differences."""
