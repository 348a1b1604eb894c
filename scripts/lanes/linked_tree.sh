# shellcheck shell=bash
# Sourced by types and imports: the package as it is when installed, xpuquant with convert, formats and kernels below it.
#
#   tree=$(linked_tree ROOT)     a new folder with xpuquant/, of links; its caller removes it
#
# In the repository the folders lie side by side and an editable installation maps them, which tools that walk a package's
# folder do not see.
linked_tree() {
  local root=$1 tree
  tree=$(mktemp -d)
  mkdir "$tree/xpuquant"
  ln -s "$root"/xpuquant/* "$root/formats" "$root/kernels" "$tree/xpuquant/"
  ln -s "$root/convert" "$tree/xpuquant/conversion"
  echo "$tree"
}
