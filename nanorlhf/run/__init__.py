"""What every long job needs: command line, processes, run folder, log, optimizer, speed."""
