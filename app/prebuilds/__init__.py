"""Engines that are built for a job while it waits for a worker with the device that they are for."""
