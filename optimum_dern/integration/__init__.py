"""Where other libraries find this one."""
