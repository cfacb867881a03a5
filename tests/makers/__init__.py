"""Programs that write the sample files and build the narrow models of the tests."""
