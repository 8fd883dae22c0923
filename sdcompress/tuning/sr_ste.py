"""sr_ste"""
