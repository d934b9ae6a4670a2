"""What every long run shares: settings, processes, disk, progress, and what is written safely."""
