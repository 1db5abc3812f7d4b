"""Make the page of an evaluation: read it, choose its clips, and write it with its pictures, audio and exports."""
