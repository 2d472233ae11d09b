"""Checks that a user can run: are the published methods what we compute?"""
