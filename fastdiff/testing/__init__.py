"""Tools with which users test fastdiff against other libraries' own test-suites."""
