#!/bin/sh
# Installs what `make test-vulkan` needs besides scripts/setup.sh and this machine lacks. Says what it does; does nothing where nothing is
# missing.
#
# Debian 12's headers and software driver are too old. Those of Debian 13 are unpacked into FOLDER, and the system keeps its own. What finds them
# there is written to FOLDER/environment, for a shell to read before it builds and runs.
#
# With `run`, what compiling needs is left out, and FOLDER/run runs a program (in PATH, or by its path) with the driver, on the device that it has found.
#
# usage: setup-vulkan.sh FOLDER [run]
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

mkdir -p "$1"
folder=$(cd "$1" && pwd)
purpose=${2:-compile}
environment=$folder/environment
[ -e "$environment" ] || : >"$environment"
# shellcheck source=/dev/null # what an earlier run wrote
. "$environment"

# Mesa's llvmpipe runs llama.cpp's shaders from here on; that of 22 ends the process with a segmentation fault.
MESA_MIN=25

headers() { echo "${VULKAN_SDK:-/usr}/include"; }
has_spirv_headers() {
    for config in "${VULKAN_SDK:-/usr}"/share/cmake/SPIRV-Headers/*Config.cmake /usr/share/cmake/SPIRV-Headers/*Config.cmake \
        /usr/lib/*/cmake/SPIRV-Headers/*Config.cmake /usr/local/share/cmake/SPIRV-Headers/*Config.cmake; do
        # A pattern that nothing matches stands for itself.
        [ -e "$config" ] && return 0
    done
    return 1
}
has_driver() {
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    for driver in /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json; do
        [ -e "$driver" ] && return 0
    done
    return 1
}

missing=""
if [ "$purpose" = compile ]; then
    command -v glslc >/dev/null 2>&1 || [ -x "${VULKAN_SDK:-}/bin/glslc" ] || missing="$missing glslc"
    [ -e "$(headers)/vulkan/vulkan.hpp" ] || missing="$missing libvulkan-dev"
    has_spirv_headers || missing="$missing spirv-headers"
fi
has_driver || missing="$missing mesa-vulkan-drivers"
command -v vulkaninfo >/dev/null 2>&1 || missing="$missing vulkan-tools"

if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of package names
    install_missing "Tests on Vulkan need" $missing
fi

is_debian_12() { grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release 2>/dev/null; }

# unpack NAME PACKAGE...: packages of Debian 13 and all that they depend on into FOLDER/NAME, their signatures checked. The system's own list of
# packages is neither read nor changed.
unpack() {
    name=$1
    shift
    echo "Unpacking into $folder/$name, from Debian 13: $*" >&2
    apt=$(mktemp -d)
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    # From where this system gets its own.
    # shellcheck disable=SC2016 # apt-get's own format
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | grep -v security | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$apt/sources"
    own() {
        apt-get -q -y -o Dir::Etc::SourceList="$apt/sources" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$apt/lists" \
            -o Dir::Cache="$apt/cache" -o Dir::State::status="$apt/status" -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
            -o APT::Install-Recommends=0 "$@" >&2
    }
    own update
    own install --download-only "$@"
    rm -rf "${folder:?}/$name"
    for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$folder/$name"; done
    rm -rf "$apt"
}

# llama.cpp asks the validation layer for its settings by types that Vulkan's headers have since 1.3.272.
if [ "$purpose" = compile ] && ! grep -qs VK_EXT_LAYER_SETTINGS_EXTENSION_NAME "$(headers)/vulkan/vulkan_core.h"; then
    echo "Vulkan's headers in $(headers) are too old for llama.cpp: VK_EXT_layer_settings is not in them." >&2
    if [ -n "${VULKAN_SDK:-}" ] || ! is_debian_12; then
        echo "Set VULKAN_SDK to a newer SDK (https://vulkan.lunarg.com), or build on Debian 13 or Ubuntu 24.04." >&2
        exit 2
    fi
    unpack headers libvulkan-dev
    # The loader that is linked is the system's own.
    rm -rf "$folder/headers/usr/lib"
    echo "export VULKAN_SDK='$folder/headers/usr'" >>"$environment"
    # shellcheck source=/dev/null
    . "$environment"
fi

# What cargo runs tests with, if anything.
runner=CARGO_TARGET_$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')_RUNNER
device=${GGML_VK_VISIBLE_DEVICES:-0}
device=${device%%,*}
# driver FIELD: what Vulkan says of the device that the tests are to use. Its loader numbers them as llama.cpp does.
driver() {
    eval "\${$runner:-} $(command -v vulkaninfo) --summary" 2>/dev/null |
        awk -v device="GPU$device:" -v field="$1" '/^GPU/ { own = $1 == device } own && $1 == field { sub(/^[^=]*= */, ""); print }'
}
# Major version of Mesa where the device is its software driver, else nothing.
software_mesa() { [ "$(driver driverName)" != llvmpipe ] || driver driverInfo | sed -n 's/^Mesa \([0-9]*\)\..*/\1/p'; }

mesa=$(software_mesa)
if [ -n "$mesa" ] && [ "$mesa" -lt "$MESA_MIN" ]; then
    echo "The software driver is too old: $(driver driverInfo), where $MESA_MIN is needed." >&2
    if ! is_debian_12; then
        echo "Install Mesa $MESA_MIN (Debian 13, Ubuntu 24.04 with its updates), or set VK_DRIVER_FILES to a driver of it." >&2
        exit 2
    fi
    # With the C library that it is linked with, whose loader then runs the tests, and what they link.
    unpack driver mesa-vulkan-drivers libvulkan1 libstdc++6 libgomp1
    libraries=$(dirname "$folder"/driver/usr/lib/*/libvulkan_lvp.so)
    {
        echo "export VK_DRIVER_FILES='$(echo "$folder"/driver/usr/share/vulkan/icd.d/lvp_icd*.json)'"
        echo "export $runner='$(echo "$libraries"/ld-linux*.so.*) --library-path $libraries'"
    } >>"$environment"
    # shellcheck source=/dev/null
    . "$environment"
fi
if [ -z "$(driver driverName)" ]; then
    echo "Vulkan has no device number $device: see \`vulkaninfo --summary\`, and choose by GGML_VK_VISIBLE_DEVICES." >&2
    echo "The software driver is Debian's and Ubuntu's package mesa-vulkan-drivers." >&2
    exit 2
fi
if [ "$purpose" = run ]; then
    loader=$(eval "echo \"\${$runner:-}\"")
    {
        echo '#!/bin/sh'
        echo 'program=$(command -v "$1") || exit 127'
        echo 'shift'
        echo "export GGML_VK_VISIBLE_DEVICES='$device'"
        [ -z "${VK_DRIVER_FILES:-}" ] || echo "export VK_DRIVER_FILES='$VK_DRIVER_FILES'"
        echo "exec $loader \"\$program\" \"\$@\""
    } >"$folder/run"
    chmod +x "$folder/run"
fi
echo "Tests run on Vulkan's device $device: $(driver deviceName), $(driver driverInfo)" >&2
