"""The HTTPS side: the front that publishes the fleet paths and the join call, and the admin API on loopback."""
