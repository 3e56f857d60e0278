"""syncd on a booted Debian: `make test-boot`, as root. Nothing else collects these."""
