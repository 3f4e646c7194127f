"""Analyses of the tables of a contract: what is asked, what each site allows, and the result that equals the pooled one."""
