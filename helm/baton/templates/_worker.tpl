{{/* One worker's container. Takes a list: root, role, the role's values, port. */}}
{{- define "baton.workerContainer" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $worker := index . 2 -}}
{{- $port := index . 3 -}}
{{- $image := ternary $root.Values.image.cuda $root.Values.image.cpu (gt (int $worker.gpus) 0) -}}
- name: {{ $role }}
  image: {{ include "baton.image" (list $root $image) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [{{ $role }}, --config, /etc/baton/{{ $role }}.yaml]
  env:
    # It listens and is reached at the pod's own address.
    - name: BATON_HOST
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    {{- if $worker.rdma.enabled }}
    - {name: UCX_MODULES, value: all}
    {{- end }}
    {{- include "baton.hubToken" $root | nindent 4 }}
    {{- with $worker.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: {{ ternary "grpc" (printf "grpc-%s" $role) (eq $port 50061) }}, containerPort: {{ $port }}}
    - {name: {{ ternary "metrics" (printf "metrics-%s" $role) (eq $port 50061) }}, containerPort: {{ include "baton.metricsPort" $port }}}
  # It opens its port once the model is loaded. None of the probes asks for a peer.
  startupProbe:
    {{- include "baton.probe" (list $root $port "") | nindent 4 }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: {{ div (add $worker.startupSeconds 4) 5 }}
  livenessProbe:
    {{- include "baton.probe" (list $root $port "") | nindent 4 }}
    periodSeconds: {{ include "baton.probePeriod" (list $root 10) }}
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    {{- include "baton.probe" (list $root $port "baton.v1.Worker") | nindent 4 }}
    periodSeconds: {{ include "baton.probePeriod" (list $root 3) }}
    timeoutSeconds: {{ ternary 5 3 $root.Values.tls.workers.enabled }}
    failureThreshold: 3
  lifecycle:
    # Routers see that the pod goes; then SIGTERM drains it: prefill until its pages were fetched, decode
    # until its requests end.
    preStop:
      exec: {command: [sleep, "3"]}
  securityContext: {{- include "baton.containerSecurity" $root | nindent 4 }}
  resources:
    {{- $requests := deepCopy (default dict $worker.resources.requests) }}
    {{- $limits := deepCopy (default dict $worker.resources.limits) }}
    {{- if gt (int $worker.gpus) 0 }}
    {{- $_ := set $limits $worker.gpuResource (toString $worker.gpus) }}
    {{- $_ := set $requests $worker.gpuResource (toString $worker.gpus) }}
    {{- end }}
    {{- if $worker.rdma.enabled }}
    {{- $_ := set $limits $worker.rdma.resource (toString $worker.rdma.count) }}
    {{- $_ := set $requests $worker.rdma.resource (toString $worker.rdma.count) }}
    {{- end }}
    requests: {{- toYaml $requests | nindent 6 }}
    limits: {{- toYaml $limits | nindent 6 }}
  volumeMounts:
    {{- include "baton.scratchMounts" $root | nindent 4 }}
    - {name: shm, mountPath: /dev/shm}
    - {name: cache, mountPath: /var/cache/baton}
    - {name: config, mountPath: /etc/baton, readOnly: true}
    {{- if $root.Values.tls.workers.enabled }}
    - {name: tls, mountPath: /etc/baton-tls, readOnly: true}
    {{- end }}
    {{- include "baton.modelMount" $root | nindent 4 }}
{{- end -}}

{{/* Everything of a worker's pod but its containers. Takes a list: root, the role's values, name of the ConfigMap. */}}
{{- define "baton.workerPod" -}}
{{- $root := index . 0 -}}
{{- $worker := index . 1 -}}
serviceAccountName: {{ include "baton.workerAccount" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $worker.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $worker.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext: {{- include "baton.podSecurity" $root | nindent 2 }}
# preStop's sleep, the drain, and the time to end.
{{- $drain := add 3 (ceil (default 60 $worker.settings.drain_timeout_s)) 10 }}
terminationGracePeriodSeconds: {{ max $drain $worker.terminationGracePeriodSeconds }}
volumes:
  {{- include "baton.scratch" $root | nindent 2 }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $worker.shmSize }}}
  - name: cache
    {{- if $worker.cache.claimName }}
    persistentVolumeClaim: {claimName: {{ $worker.cache.claimName }}}
    {{- else }}
    emptyDir: {sizeLimit: {{ $worker.cache.sizeLimit }}}
    {{- end }}
  - name: config
    configMap: {name: {{ index . 2 }}}
  {{- if $root.Values.tls.workers.enabled }}
  - name: tls
    secret: {secretName: {{ include "baton.workersTlsSecret" $root }}, defaultMode: 0440}
  {{- end }}
  {{- include "baton.modelVolume" $root | nindent 2 }}
{{- with $worker.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $worker.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $worker.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $worker.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
