# For the setup scripts to read: it does nothing by itself.

# install_missing PURPOSE PACKAGE...: says that PURPOSE needs packages, then installs them. Ends the script where this system has no apt-get.
install_missing() {
    purpose=$1
    shift
    echo "$purpose what this machine does not have: $*" >&2
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "Install them by hand with this system's package manager, then try again." >&2
        exit 2
    fi
    sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    echo "Installing now. By hand it is: $sudo apt-get install -y $*" >&2
    $sudo apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q "$@" >&2
}
