"""What every process with torch stands on."""
