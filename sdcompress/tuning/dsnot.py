"""dsnot"""
