"""Devices, ranks, process groups and their rendezvous."""
