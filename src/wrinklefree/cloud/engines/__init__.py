"""What runs jobs, each by the same three functions: `launch`, `logs`, `cancel`.

| engine | runs |
|---|---|
| `sky` | on any cloud that SkyPilot knows, by its program `sky` |
| `hub` | Hugging Face Jobs, by huggingface_hub |
| `background` | on this machine, behind the terminal |
"""
