"""What is measured: loss, keyword recall, statistics, parameters, memory, time."""
