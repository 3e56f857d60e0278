"""Faults of the machine: crashes at every call, disks that fail, power cuts, years of trouble.

Run by `make test-faults`.
"""
