"""The simulated practice: Open Dental's API and an SFTP site, for `syncd demo` and for tests."""
