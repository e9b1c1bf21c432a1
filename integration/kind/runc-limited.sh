#!/bin/sh
# runc for a machine without CAP_SYS_RESOURCE. A privileged container asks for every capability, and
# runc stops if there is one that it cannot give. It is taken out of what is asked for.
previous='' file=''
for argument in "$@"; do
    case $previous in
        --bundle | -b) file=$argument/config.json ;;
        --process | -p) file=$argument ;;
    esac
    case $argument in
        --bundle=*) file=${argument#*=}/config.json ;;
        --process=*) file=${argument#*=} ;;
    esac
    previous=$argument
done
if [ -n "$file" ] && [ -w "$file" ]; then
    sed -i -e 's/"CAP_SYS_RESOURCE",//g' -e 's/,"CAP_SYS_RESOURCE"//g' "$file"
fi
exec /usr/sbin/runc "$@"
